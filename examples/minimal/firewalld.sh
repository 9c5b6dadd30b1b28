# The host's own firewall, with firewalld. knockq only shuts port 22 to strangers: here it must be allowed.
firewall-cmd --permanent --add-service=ssh
firewall-cmd --permanent --add-port=80/tcp
firewall-cmd --reload
