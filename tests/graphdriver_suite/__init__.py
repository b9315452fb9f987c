"""What every graph driver is put through, ours and Docker's behind a plugin; :mod:`.cases` says how."""
