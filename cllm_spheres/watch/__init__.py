"""metrics.jsonl of a run -> what a person sees: a live dashboard, plain lines, a picture."""
