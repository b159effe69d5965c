"""What tests share: tiny bases, random adapters, a server process."""
