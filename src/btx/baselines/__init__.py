"""What BTX is compared with."""
