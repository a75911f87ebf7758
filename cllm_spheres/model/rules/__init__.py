"""What each step becomes in a dtype: ops, forward and backward, and the sizes of what they work on."""
