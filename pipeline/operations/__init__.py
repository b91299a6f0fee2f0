"""What people do with a store after it is written: a module a command, and what several of them share."""
