"""The rest of ROOT: its layout, staging, trash, and what has reached the disk."""
