"""Parts that core does not have, written against the contract alone."""
