"""Files that hold a GPT-2, read and written without executing anything in them."""
