"""What people look at: one HTML page for profiles, choices, quality and answers, that opens from disk."""
