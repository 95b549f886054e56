"""The literal forms: slow, float64-capable, obviously right. They judge the fast path and import none of it."""
