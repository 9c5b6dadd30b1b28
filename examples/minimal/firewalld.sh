# The host's own firewall, with firewalld. knockq only shuts port 22 to strangers: here it must be allowed.
firewall-cmd --permanent --zone=public --add-service=ssh
firewall-cmd --permanent --zone=public --add-port=80/tcp
firewall-cmd --permanent --zone=public --set-target=DROP    # as silent as a knock port
firewall-cmd --reload
