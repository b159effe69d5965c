"""The SQL registry: tenants, keys, tasks, versions, routes and the audit log."""
