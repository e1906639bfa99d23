"""What serving costs: targets of several sizes, guarded and unguarded in turns on a real server."""
