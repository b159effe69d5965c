"""The SQL registry: tenants, keys, tasks, versions, routes, usage and the audit log."""
