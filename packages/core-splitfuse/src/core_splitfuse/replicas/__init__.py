"""Several engines behind one address: processes that Ray Serve starts, watches and replaces."""
