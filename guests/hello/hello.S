/* hello: writes a byte to COM1 with its first instructions, and sleeps.  So the time until the byte comes is the
 * start-up time of the VM alone, without that of a guest. */

    .text
    .code32
    .globl pvh_start
pvh_start:
    movw $0x3F8, %dx
    movb $'!', %al
    outb %al, %dx
    cli
1:  hlt
    jmp 1b

    .section .note.GNU-stack, "", @progbits
