"""Work on a root that nobody waits for: when it is done, and what is measured, noted and copied then."""
