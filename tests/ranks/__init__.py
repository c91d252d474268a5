"""What tests run on several ranks."""
