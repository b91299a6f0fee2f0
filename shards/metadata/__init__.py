"""The small objects of a store: identities, plan, layout, commit records, index, manifest, small arrays."""
