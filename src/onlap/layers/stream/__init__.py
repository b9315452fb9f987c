"""Archives as streams: compression, digests, and the threads that read and write them."""
