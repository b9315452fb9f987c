"""Every system call of every verb: killed before it, or failing with each error that it may return."""
