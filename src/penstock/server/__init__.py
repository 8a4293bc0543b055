"""THE LOOP: admission, the conversation, the body, a worker."""
