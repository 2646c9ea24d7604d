"""What can be told about an adapter before and beside any repair. Numbers to read; none of them is a verdict."""
