"""HTTP server: many users, one engine."""
