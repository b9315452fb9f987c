"""Reading and writing the tar format."""
