"""Reads weight files: tensors under the names that transformers expects, whatever their format on disk."""
