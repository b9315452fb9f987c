"""Stores that real daemons made, and what is damaged in them by hand."""
