"""What is asked of a running server, and how its answers become records."""
