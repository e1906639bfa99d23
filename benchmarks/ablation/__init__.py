"""What each part of the guard is worth."""
