#!/bin/bash
# A real Slurm cluster on one machine, without systemd: to try jobs, and for the tests (docs/slurm-local.md).
#
#     slurm/local_cluster.sh start            start it, or what of it is not running; installs what is missing
#     eval "$(slurm/local_cluster.sh env)"    sbatch, srun, ... of this shell use it
#     slurm/local_cluster.sh status           its daemons and nodes; 0 where all run
#     slurm/local_cluster.sh stop             end it: nothing of it is left running
#
#   SLURM_LOCAL_ROOT       folder of its files (default: ${TMPDIR:-/tmp}/gtddp-slurm). Another folder, another cluster
#   SLURM_LOCAL_NODES      nodes: node0, node1, ... (2)
#   SLURM_LOCAL_CPUS       CPUs that Slurm believes each to have, however many there are (4)
#   SLURM_LOCAL_GPUS       GPUs likewise: jobs that ask for them get nodes, and no GPU (4)
#   SLURM_LOCAL_NETWORK    loopback: nodes share the machine's network. veth: each has a network of its own, and is
#                          joined to the others by a link that can be cut: ip link set $(cat <root>/node1/link) down
#
# Partitions: main (default), whose jobs are preempted, and urgent, for whose jobs they are put back into the queue.
#
# The controller and each node are a *box*: processes in PID, mount and host name spaces of their own. A box ends with its
# first process, and all that runs in it with that, which is how stop leaves nothing behind. Needs root for it.
set -euo pipefail

NODES=${SLURM_LOCAL_NODES:-2}
CPUS=${SLURM_LOCAL_CPUS:-4}
GPUS=${SLURM_LOCAL_GPUS:-4}
NETWORK=${SLURM_LOCAL_NETWORK:-loopback}
ROOT=${SLURM_LOCAL_ROOT:-${TMPDIR:-/tmp}/gtddp-slurm}
START_WITHIN_S=30
GRACE_S=30 # between a preemption's signal and the end of the job

die() {
    echo "local_cluster.sh: $*" >&2
    exit 1
}

# --- What it is made of ----------------------------------------------------------------------------------------------

# A number for the ports, addresses and links of this cluster, which nothing else on the machine uses.
free_number() {
    local sum first number port ports
    sum=$(cksum <<<"$ROOT")
    first=$((${sum%% *} % 100))
    for number in $(seq "$first" 99) $(seq 0 "$first"); do
        ports=$(for ((port = 0; port <= NODES; port++)); do printf ':%04X \n' $((10000 + number * 100 + port)); done)
        if ! listening | grep -F "$ports" >/dev/null && [ ! -e "/sys/class/net/gtddp$number" ]; then
            echo "$number"
            return
        fi
    done
    die "no free ports between 10000 and 20000"
}

# Sockets that listen (state 0A), a line each.
listening() {
    grep -hs ":0000 0A " /proc/net/tcp /proc/net/tcp6 || true
}

names() {
    [ -s "$ROOT/number" ] || free_number >"$ROOT/number"
    NUMBER=$(cat "$ROOT/number")
    BRIDGE=gtddp$NUMBER
    PORT=$((10000 + NUMBER * 100)) # of the controller; nodes have the next ones
    if [ "$NETWORK" = veth ]; then
        SUBNET=10.213.$NUMBER
    else
        SUBNET=127.213.$NUMBER
    fi
}

address() { # of head or node<i>
    case $1 in
    head) echo "$SUBNET.1" ;;
    node*) echo "$SUBNET.$((10 + ${1#node}))" ;;
    esac
}

node_names() {
    local i
    for ((i = 0; i < NODES; i++)); do echo "node$i"; done
}

link() { # the end of a node's link that is on this machine
    echo "$BRIDGE-${1#node}"
}

# --- Programs --------------------------------------------------------------------------------------------------------

PROGRAMS=(munged slurmctld slurmd sbatch unshare nsenter)

missing_programs() {
    local name
    for name in "${PROGRAMS[@]}"; do
        command -v "$name" >/dev/null || echo "$name"
    done
    [ "$NETWORK" != veth ] || command -v ip >/dev/null || echo ip
}

install_programs() {
    local missing packages=(slurmctld slurmd slurm-client munge)
    missing=$(missing_programs | paste -sd ' ')
    [ -n "$missing" ] || return 0
    [ "$NETWORK" != veth ] || packages+=(iproute2)
    local command="apt-get install --no-install-recommends ${packages[*]}"
    [ "$(id -u)" = 0 ] || die "missing: $missing. As root: $command (or start this as root, which does it)"
    command -v apt-get >/dev/null || die "missing: $missing. They are in Debian's packages ${packages[*]}"
    echo "installing ${packages[*]}"
    # RUNLEVEL=1: the packages' own services are not started; the cluster has its own.
    export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1
    local log
    log=$(mktemp)
    # shellcheck disable=SC2086 # words
    if ! ${command/install/install -y} >"$log" 2>&1 && ! { apt-get update && ${command/install/install -y}; } >"$log" 2>&1; then
        tail -n 20 "$log" >&2
        rm "$log"
        die "missing: $missing, and this failed: $command"
    fi
    rm "$log"
    missing=$(missing_programs | paste -sd ' ')
    [ -z "$missing" ] || die "still missing after $command: $missing"
}

# --- Boxes -----------------------------------------------------------------------------------------------------------

# The first process of a box, by its number on this machine; nothing where the box is not there.
box_pid() {
    local pid
    pid=$(cat "$ROOT/$1/box.pid" 2>/dev/null) || return 1
    # Numbers are given away again: it has to be ours.
    grep -qzFx "GTDDP_BOX=$ROOT/$1" "/proc/$pid/environ" 2>/dev/null || return 1
    echo "$pid"
}

start_box() {
    local name=$1 pid spaces=(--uts --ipc --mount --propagation private --pid --fork --kill-child --mount-proc)
    box_pid "$name" >/dev/null && return
    mkdir -p "$ROOT/$name"
    rm -f "$ROOT/$name"/*.pid
    if [ "$NETWORK" = veth ] && [ "$name" != head ]; then
        spaces+=(--net)
    fi
    # The last line waits for ever, and takes in what is left of ended processes.
    # shellcheck disable=SC2016 # the box's variables
    GTDDP_BOX=$ROOT/$name setsid unshare "${spaces[@]}" bash -c '
        hostname "$1"
        mount --bind "$2/hosts" /etc/hosts
        touch "$2/$1/ready"
        sleep infinity &
        wait' box "$name" "$ROOT" </dev/null >"$ROOT/$name/box.log" 2>&1 9>&- &
    local unshare=$!
    disown
    # Its only child is the box.
    until pid=$(cat "/proc/$unshare/task/$unshare/children" 2>/dev/null) && [ -n "$pid" ] &&
        [ -e "$ROOT/$name/ready" ]; do
        within_time && [ -e "/proc/$unshare" ] || die "$name does not start: $(tail -n 3 "$ROOT/$name/box.log")"
    done
    rm "$ROOT/$name/ready"
    echo "${pid// /}" >"$ROOT/$name/box.pid"
    if [ "$NETWORK" = veth ] && [ "$name" != head ]; then
        join_network "$name" "${pid// /}"
    fi
}

in_box() {
    local name=$1
    shift
    nsenter --target "$(box_pid "$name")" --all -- "$@" 9>&-
}

# Whether a daemon of a box runs, by its file of the process number inside the box.
runs() { # box, daemon
    local pid
    pid=$(cat "$ROOT/$1/$2.pid" 2>/dev/null) && box_pid "$1" >/dev/null && in_box "$1" kill -0 "$pid" 2>/dev/null
}

# All that carry its variable, wherever its files are.
box_processes() {
    # It fails where a process ends meanwhile.
    { grep -lzsF "GTDDP_BOX=$ROOT/" /proc/[0-9]*/environ || true; } | cut -d / -f 3
}

stop_boxes() {
    local pid pids
    pids=$(box_processes)
    for pid in $pids; do
        kill -KILL "$pid" 2>/dev/null || true
    done
    for pid in $pids; do
        until has_ended "$pid"; do
            within_time || die "process $pid does not end"
        done
    done
}

# Once the first process of a box has, all others in it have ended before.
has_ended() {
    [ ! -e "/proc/$1" ] || grep -qsE '^State:[[:space:]]*[ZX]' "/proc/$1/status"
}

# --- The network of NETWORK=veth -------------------------------------------------------------------------------------

start_bridge() {
    [ -e "/sys/class/net/$BRIDGE" ] || ip link add "$BRIDGE" type bridge
    ip link set "$BRIDGE" alias "$ROOT" # by which stop finds it
    ip address replace "$(address head)/24" dev "$BRIDGE"
    ip link set "$BRIDGE" up
}

join_network() { # node, its box
    link "$1" >"$ROOT/$1/link"
    ip link add "$(link "$1")" type veth peer name eth0 netns "$2"
    ip link set "$(link "$1")" master "$BRIDGE" up
    nsenter --target "$2" --net -- ip address add "$(address "$1")/24" dev eth0
    nsenter --target "$2" --net -- ip link set eth0 up
    nsenter --target "$2" --net -- ip link set lo up
}

# Links end with the networks of their nodes, but not at once.
stop_network() {
    local bridge name
    for bridge in /sys/class/net/gtddp*; do
        [ "$(cat "$bridge/ifalias" 2>/dev/null)" = "$ROOT" ] || continue
        for name in "$bridge"/brif/*; do
            ip link delete "$(basename "$name")" 2>/dev/null || true
        done
        ip link delete "$(basename "$bridge")" 2>/dev/null || true
    done
}

# --- Configuration ---------------------------------------------------------------------------------------------------

write_hosts() {
    local name
    echo "127.0.0.1 localhost"
    for name in head $(node_names); do echo "$(address "$name") $name"; done
}

write_slurm_conf() {
    local name features=""
    [ "$GPUS" = 0 ] || features="Gres=gpu:$GPUS"
    cat <<END
ClusterName=gtddp$NUMBER
SlurmctldHost=head($(address head))
SlurmctldPort=$PORT
CommunicationParameters=NoCtldInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A job that was put back waits for old credentials to run out: 2 minutes otherwise.
AuthInfo=socket=$ROOT/head/munge.socket,cred_expire=5
StateSaveLocation=$ROOT/head/state
SlurmctldPidFile=$ROOT/head/slurmctld.pid
SlurmctldLogFile=$ROOT/log/slurmctld.log
SlurmdSpoolDir=$ROOT/%n/spool
SlurmdPidFile=$ROOT/%n/slurmd.pid
SlurmdLogFile=$ROOT/log/%n.log
# Nothing that needs cgroups, a database, or more than one core.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
# Soon: what takes minutes on a real cluster.
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=5,bf_interval=5
ReturnToService=2
SlurmdTimeout=15
KillWait=5
InactiveLimit=0
# Ended jobs are remembered; their numbers are not used again after a new start.
MinJobAge=86400
FirstJobId=$((1000 + ($(date +%s) / 10) % 50000000))
MaxArraySize=1001
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
END
    [ "$GPUS" = 0 ] || echo "GresTypes=gpu"
    for name in $(node_names); do
        # Memory that nothing is refused for: it is not counted.
        echo "NodeName=$name NodeHostname=$name NodeAddr=$(address "$name") Port=$((PORT + 1 + ${name#node})) CPUs=$CPUS RealMemory=1000000" \
            "Features=local,v100 $features"
    done
    echo "PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=$GRACE_S MaxTime=INFINITE State=UP"
    echo "PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP"
}

# --- Commands --------------------------------------------------------------------------------------------------------

deadline=$((SECONDS + START_WITHIN_S))
within_time() { # for loops that wait: false once the time is over
    sleep 0.1
    [ $SECONDS -lt $deadline ]
}

start_munged() {
    runs head munged && return
    [ -e "$ROOT/head/munge.key" ] || (umask 077 && head -c 128 /dev/urandom >"$ROOT/head/munge.key")
    in_box head munged --force --syslog --socket="$ROOT/head/munge.socket" --key-file="$ROOT/head/munge.key" \
        --pid-file="$ROOT/head/munged.pid" --seed-file="$ROOT/head/munge.seed" --log-file="$ROOT/log/munged.log"
}

all_up() {
    local states
    states=$(sinfo --noheader --Node --partition=main --format=%T 2>/dev/null) || return 1
    [ "$(grep -cE '^(idle|mixed|allocated|completing)$' <<<"$states")" = "$NODES" ]
}

start() {
    local name i
    install_programs
    [ "$(id -u)" = 0 ] || die "needs root: it makes namespaces, and Slurm's daemons start jobs as their users"
    unshare --uts --ipc --mount --pid --net --fork true 2>/dev/null ||
        die "needs leave to make namespaces, which this container does not give (docker run --privileged does)"
    mkdir -p "$ROOT/head/state" "$ROOT/log"
    exec 9>"$ROOT/lock"
    flock --timeout 60 9 || die "another start or stop of $ROOT is under way"
    if [ -e "$ROOT/knobs" ] && [ "$(cat "$ROOT/knobs")" != "$(knobs)" ] && box_pid head >/dev/null; then
        die "it runs with other settings ($(cat "$ROOT/knobs")): stop it first"
    fi
    if ! box_pid head >/dev/null; then
        trap give_up EXIT # else it was running, and what is left of it stays
        stop_boxes # nodes without their controller
        stop_network
        clean
        names
        mkdir -p "$ROOT/head/state"
        knobs >"$ROOT/knobs"
        write_hosts >"$ROOT/hosts"
        write_slurm_conf >"$ROOT/slurm.conf"
        if [ "$GPUS" != 0 ]; then
            # Slurm wants a device for each: this one is /dev/null.
            mkdir -p "$ROOT/head/gpus"
            for ((i = 0; i < GPUS; i++)); do mknod "$ROOT/head/gpus/gpu$i" c 1 3; done
            echo "Name=gpu File=$ROOT/head/gpus/gpu[0-$((GPUS - 1))]" >"$ROOT/gres.conf"
        fi
    fi
    names
    export SLURM_CONF=$ROOT/slurm.conf
    [ "$NETWORK" != veth ] || start_bridge
    start_box head
    start_munged
    runs head slurmctld || in_box head slurmctld
    for name in $(node_names); do
        start_box "$name"
        mkdir -p "$ROOT/$name/spool"
        runs "$name" slurmd || in_box "$name" slurmd -N "$name"
    done
    until all_up; do
        within_time || die "not all nodes are up after $START_WITHIN_S s: $(sinfo --Node --long 2>&1 | tail -n +3)"
    done
    trap - EXIT
    echo "$NODES nodes are up. In this shell: eval \"\$($0 env)\""
}

# The end of a first start that failed.
give_up() {
    local log
    for log in "$ROOT"/log/*.log; do
        [ ! -s "$log" ] || { echo "--- $log" && tail -n 5 "$log"; } >&2
    done
    deadline=$((SECONDS + 10))
    stop_boxes
    stop_network
    clean
    echo "local_cluster.sh: did not start; nothing of it is left running" >&2
}

knobs() {
    echo "nodes $NODES, CPUs $CPUS, GPUs $GPUS, network $NETWORK"
}

# What a cluster leaves in its folder, except its logs and its lock.
clean() {
    rm -rf "$ROOT/head" "$ROOT"/node[0-9]* "$ROOT"/{hosts,slurm.conf,gres.conf,knobs,number}
}

stop() {
    [ "$(id -u)" = 0 ] || die "needs root"
    mkdir -p "$ROOT" # processes may be there without it
    exec 9>"$ROOT/lock"
    flock --timeout 60 9 || die "another start or stop of $ROOT is under way"
    stop_boxes
    stop_network
    clean
    echo "stopped; its logs are in $ROOT/log"
}

status() {
    local name daemon code=0 daemons=("head munged" "head slurmctld")
    [ "$(id -u)" = 0 ] || die "needs root; sinfo does not"
    [ -e "$ROOT/knobs" ] || die "there is no cluster in $ROOT"
    cat "$ROOT/knobs"
    for name in "$ROOT"/node*/; do daemons+=("$(basename "$name") slurmd"); done
    for daemon in "${daemons[@]}"; do
        # shellcheck disable=SC2086 # two words
        if runs $daemon; then
            echo "$daemon: runs"
        else
            echo "$daemon: does not run"
            code=1
        fi
    done
    [ $code != 0 ] || SLURM_CONF=$ROOT/slurm.conf sinfo --Node --long || code=1
    return $code
}

case ${1:-} in
start | stop | status) ;;
env)
    printf 'export SLURM_CONF=%q\n' "$(realpath -m "$ROOT")/slurm.conf"
    exit
    ;;
*)
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "$0"
    exit 2
    ;;
esac
[[ $NODES =~ ^[1-9][0-9]?$ ]] || die "SLURM_LOCAL_NODES=$NODES, expected 1 to 99"
[[ $CPUS =~ ^[1-9][0-9]*$ ]] || die "SLURM_LOCAL_CPUS=$CPUS, expected a number of 1 or more"
[[ $GPUS =~ ^[0-9]+$ ]] || die "SLURM_LOCAL_GPUS=$GPUS, expected a number"
[[ $NETWORK =~ ^(loopback|veth)$ ]] || die "SLURM_LOCAL_NETWORK=$NETWORK, expected loopback or veth"
mkdir -p "$(dirname "$ROOT")"
ROOT=$(realpath -m "$ROOT")
PATH=$PATH:/usr/sbin:/sbin
"$1"
