"""dsd-p2p: decentralized LLM inference that turns link latency into throughput by speculation."""
