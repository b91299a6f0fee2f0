"""Writing a store: shards, the commit protocol, finishing, revisions, copies."""
