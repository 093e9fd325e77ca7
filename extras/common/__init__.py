"""What programs and features share."""
