"""Who is measured: every peer serves a copy of one model through the same few methods."""
