"""A linear map of one token a row, with what stands before and after it in a layer."""
