"""Model files: reading, checking and converting them, shared by the backends."""
