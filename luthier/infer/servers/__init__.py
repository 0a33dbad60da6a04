"""Models that another program serves: its process, its answers over HTTP, and the adapter that it is given."""
