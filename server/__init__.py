"""The inference server: api -> engine -> model -> adapters_store."""
