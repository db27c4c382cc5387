"""For the tests of plugins: tiny models, runs without entry points, and the contract suite."""
