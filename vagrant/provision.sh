#!/bin/sh
# Makes a fresh machine a host of the lab: provision.sh client|online|target|assistant
set -eu
role=$1

/pycopy/contrib/setup install

case $role in
online | target)
	# A web server to copy from, and one to copy to: port 80 online, 8080 on the target.
	port=80
	[ "$role" = online ] || port=8080
	DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends nginx
	printf 'server {\n\tlisten %s default_server;\n\tlisten [::]:%s default_server;\n\troot /usr/share/nginx/html;\n}\n' \
		"$port" "$port" >/etc/nginx/sites-enabled/default
	systemctl restart nginx
	;;
esac

case $role in
target)
	# The copies carry the clients' addresses, which need not be reachable over this device.
	for file in /proc/sys/net/ipv4/conf/*/rp_filter; do
		echo 0 >"$file"
	done
	;;
esac
