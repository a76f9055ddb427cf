"""What the double is made of. Nothing outside the double imports from here, and the library has no such package."""
