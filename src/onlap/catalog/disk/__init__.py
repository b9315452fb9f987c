"""What else is in ROOT: its layout, staging, trash, and what has reached the disk."""
