# Install, use, remove and purge the package on a system without systemd, as with sysvinit.
# test_deb.py runs this script as root and compares the output. /relay.deb is the package, /smoke its
# autopkgtest.
set -e

# All files, except dpkg's own state and logs.
list_files() {
	find / -xdev -not -path "/var/lib/dpkg/*" -not -path "/var/log/*pkg.log" | grep -vE '^/(before|after)$' | sort
}

count_relays() {
	cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\0' '\n' | grep -c '^/usr/sbin/transit-relay$' || true
}

list_files >/before

# An earlier boot with systemd has left the state in a folder that only root may enter.
private=/var/lib/private/transit-relay
mkdir -p -m 700 /var/lib/private
install -d -m 700 -o 64670 $private
ln -s private/transit-relay /var/lib/transit-relay

# invoke-rc.d recognises sysvinit by the runlevel, so print one.
mv /sbin/runlevel /sbin/runlevel.true
printf '#!/bin/sh\necho N 2\n' >/sbin/runlevel
chmod 755 /sbin/runlevel
dpkg -i /relay.deb
systemctl enable transit-relay-ws.socket
/etc/init.d/transit-relay status
pid=$(cat /run/transit-relay.pid)
stat -c "runs as %U" /proc/$pid
/etc/init.d/transit-relay start
[ "$(cat /run/transit-relay.pid)" = "$pid" ] && echo "is not started twice"

# The directory of the unix socket in the configuration.
stat -c "%n: %F of %U, %a" /run/transit-relay
sed -i 's/^#\(status unix:\)/\1/' /etc/transit-relay.conf
/etc/init.d/transit-relay reload
stat -c "%n: %F, %a" /run/transit-relay/status.sock

# Each reload must execute the program, whose stack then has another address (field 28), in the same
# process.
stack() { sed 's/.*) //' /proc/$1/stat | cut -d ' ' -f 26; }
before=$(stack $pid)
/etc/init.d/transit-relay reload
after=$(stack $pid)
[ $before != $after ] && [ "$(cat /run/transit-relay.pid)" = "$pid" ] && echo "reloads in the same process"
echo "this is no option" >>/etc/transit-relay.conf
/etc/init.d/transit-relay reload 2>&1 | grep -q "unrecognized arguments" && echo "a refused reload says why"
[ "$(stack $pid)" = $after ]
sed -i '$d' /etc/transit-relay.conf
dpkg -i /relay.deb
[ "$(stack $pid)" != $after ] && [ "$(cat /run/transit-relay.pid)" = "$pid" ] && echo "an upgrade reloads"

/smoke && echo "relays"
/etc/init.d/transit-relay status && exit 1
echo "$(count_relays) are left after a stop"
stat -c "%n: %F of %U, %a" /var/lib/transit-relay

echo "this is no option" >>/etc/transit-relay.conf
/etc/init.d/transit-relay start && exit 1
sed -i '$d' /etc/transit-relay.conf
/etc/init.d/transit-relay start
echo "$(count_relays) runs before the removal"

mkdir $private # as systemd creates it, if it boots in between
dpkg --remove transit-relay
echo "$(count_relays) are left after the removal"
ls /etc/transit-relay.conf /var/lib/transit-relay/usage.sqlite
dpkg --purge transit-relay
mv /sbin/runlevel.true /sbin/runlevel
list_files >/after
diff /before /after && echo "nothing is left"
