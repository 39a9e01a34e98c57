"""finecap-ray: reinforcement fine-tuning of image captioners by self-retrieval in bags of look-alikes, on Ray."""

__version__ = "0.1.0"
