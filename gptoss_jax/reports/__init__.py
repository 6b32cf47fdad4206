"""What people read: reports made from statistics."""
