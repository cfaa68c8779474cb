"""Makes one form of a model into another, by the field's own programs in environments of their own."""
