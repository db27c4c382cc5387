"""Positions: the policy that rotates queries and keys, for every attention made through core."""
