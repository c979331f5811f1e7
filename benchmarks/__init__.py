"""Measurements that print a table and write JSON. They stand outside: nothing imports them."""
