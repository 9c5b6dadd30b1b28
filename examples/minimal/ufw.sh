# The host's own firewall, with ufw. knockq only shuts port 22 to strangers: here it must be allowed.
ufw default deny incoming
ufw allow 22/tcp
ufw allow 80/tcp
ufw --force enable
