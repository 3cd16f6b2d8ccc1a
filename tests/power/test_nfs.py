"""The kernel's NFS server exports a mount; its clients' handles outlive the mount."""

import pytest

pytestmark = pytest.mark.power

SCRIPT = """
exec 2>{shared}/log; set -x
for m in nfsd nfs nfsv4; do modprobe -d /run/modules $m; done
mount -t tmpfs t /var/lib/nfs; touch /var/lib/nfs/{{etab,rmtab,state}}
mkdir -p /var/lib/nfs/{{v4recovery,sm,sm.bak,rpc_pipefs,nfsdcltrack,nfsdcld}} /tmp/client
mount -t nfsd nfsd /proc/fs/nfsd; mount -t rpc_pipefs rpc /var/lib/nfs/rpc_pipefs
echo 5 >/proc/fs/nfsd/nfsv4gracetime; echo 5 >/proc/fs/nfsd/nfsv4leasetime
dcsfs testnet up --dir /tmp/disk/net --nodes 10 --redundancy 4/6/8/10 --processes 1 >&2
export DCSFS_ACCESS=/tmp/disk/net/access.grant
dcsfs mb dcs://lab
start() {{
    dcsfs mount dcs://lab /tmp/mount -o cache_dir=/tmp/disk/cache
    exportfs -o rw,no_root_squash,fsid=0,insecure,no_subtree_check 127.0.0.1:/tmp/mount
    rpc.nfsd -N 3 --no-udp 2
}}
stop() {{ rpc.nfsd 0; exportfs -ua; exportfs -f; dcsfs umount /tmp/mount; }}
start; rpc.mountd -N 2 -N 3
mount -t nfs4 -o vers=4.2 127.0.0.1:/ /tmp/client
mkdir -p /tmp/client/one/two; cd /tmp/client/one/two
for n in 1 2 3 4 5 6 7 8 9; do echo content $n >file$n; done
ln file1 hard; mv file2 moved; ls >/dev/null
echo 3 >/proc/sys/vm/drop_caches; cat file3 >{shared}/first
stop; start
cat file4 moved hard >{shared}/second; mkdir three; mv file5 three/; echo more >>three/file5
cd /tmp; cat /tmp/mount/one/two/three/file5 >{shared}/third
ls /tmp/mount/one/two >{shared}/names
umount /tmp/client; stop; touch {shared}/ended
"""


def test_an_nfs_client_goes_on_after_the_mount_was_made_anew(machine):
    machine.power_on(SCRIPT.format(shared=machine.shared))
    ended, log = machine.shared / "ended", machine.shared / "log"
    machine.wait_until(ended.exists, 240, "the export has ended")
    trace = log.read_text(errors="replace")
    assert (machine.shared / "first").read_text() == "content 3\n", trace
    assert (machine.shared / "second").read_text() == "content 4\ncontent 2\ncontent 1\n", trace
    assert (machine.shared / "third").read_text() == "content 5\nmore\n", trace
    names = (machine.shared / "names").read_text().split()
    assert names == ["file1", "file3", "file4", "file6", "file7", "file8", "file9", "hard",
                     "moved", "three"], trace  # fmt: skip
