"""Files of any kind of text -> a prepared folder of token ids, and the readers of that folder."""
