"""How well requests are served, against named peers, by the method of the paper.

DeepSpeed-FastGen, arXiv 2401.08671, section 4: normally distributed lengths, clients in a closed
loop or arrivals by chance, latencies of tokens, and the throughput that is good enough for readers.
"""
