"""One generation: who asks, which adapters it uses, its tokens, its text and its accounts."""
