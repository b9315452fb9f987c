"""What a layer changed, and the archive that says it."""
